"""What training on many processes costs, from sizes alone: memory of a process, bytes of each collective, time."""
