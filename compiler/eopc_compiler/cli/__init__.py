"""Commands that need the compiler extra; eopc_runtime.cli.main imports them when they run."""
