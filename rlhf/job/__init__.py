"""Configs, files, folders and logs of a job."""
