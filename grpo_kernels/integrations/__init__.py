"""Adapters for other libraries; each module is imported on demand."""
