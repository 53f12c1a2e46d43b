"""One token at the speed of a CPU's memory."""
