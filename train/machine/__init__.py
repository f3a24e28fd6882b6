"""What the machine needs before JAX starts: its CPU and its cache of compiled programs."""
