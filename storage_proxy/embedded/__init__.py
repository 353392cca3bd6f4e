"""The one-machine stack of `mooring up`: a real S3 server, Redis, the three daemons, and the job that proves them."""
