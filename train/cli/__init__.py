"""The `jumpscope` command: one module a verb, each imported only when it is asked for."""
