"""Dagster's view: assets, checks, jobs, sensors and resources. Thin: the services do the work."""

import warnings

import dagster as dg

# Dagster does not call backfill policies and partitioned checks stable yet. Each process of a
# running instance would repeat the warning.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)
