"""Dagster's view: assets, checks, jobs, sensors and resources. Thin: the services do the work."""

import warnings

import dagster as dg

# Backfill policies and partitioned checks are not called stable yet. We know, and each process of
# a running instance would say so again.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)
