"""`python -m batch_orchestration`: the command line."""

from batch_orchestration.cli import main

if __name__ == "__main__":
    main(prog_name="python -m batch_orchestration")
