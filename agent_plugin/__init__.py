"""The node: mounts S3 folders, shares and counts them, and hands binds to containers."""
