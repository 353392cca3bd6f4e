"""Ground floor: errors, ids, paths, configuration, secrets, tokens, logs. Imports no other room of the house."""
