"""Run workers: heartbeats, their monitoring, progress and utilization."""
