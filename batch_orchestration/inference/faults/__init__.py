"""What goes wrong in a run: poison requests, engines that die, hang, refuse, need less memory."""
