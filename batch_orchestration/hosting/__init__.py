"""Engine hosts: processes that own an engine's server and outlive the runs that use it."""
