"""Paths of object stores, and the caches that runs share, on a disk or in a store."""
