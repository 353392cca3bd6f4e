"""What the agents of all nodes tell, read from Redis. Nothing here is the truth: each agent keeps that itself."""
