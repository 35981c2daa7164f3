"""Fused GRPO losses."""
