"""What the machine needs and is: its CPU, its cache of compiled programs, its chips, its processes."""
