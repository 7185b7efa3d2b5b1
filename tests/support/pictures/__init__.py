"""Pictures for tests: as arrays for the client, and as files that the server decodes."""
