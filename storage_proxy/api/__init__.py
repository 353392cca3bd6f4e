"""The HTTP faces of the proxy: for managers (a secret), for clients (tokens), for the operator's own network."""
