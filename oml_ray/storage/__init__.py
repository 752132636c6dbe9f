"""Storage: retries of transient errors, and files that are written whole and survive a power loss."""
