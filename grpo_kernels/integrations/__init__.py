"""Other libraries' objects in front of the fused losses; each module is imported on demand."""
