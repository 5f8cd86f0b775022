"""`python -m batch_orchestration.engines.simulated`: the simulated server by itself."""

from batch_orchestration.engines.simulated.engine import main

main()
