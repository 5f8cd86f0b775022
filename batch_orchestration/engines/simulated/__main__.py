"""`python -m batch_orchestration.engines.simulated`: the simulated server on its own."""

from batch_orchestration.engines.simulated.engine import main

main()
