"""The Ray runtime: sessions, resources, and failures of processes."""
