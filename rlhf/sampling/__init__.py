"""Prompts to sampled responses: engines, samplers, stored samples."""
