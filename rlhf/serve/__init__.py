"""`prudent serve`: rewards over HTTP, in every dialect of `doors.dialects`."""
