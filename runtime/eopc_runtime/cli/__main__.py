"""`python -m eopc_runtime.cli` is `eopc`."""

from eopc_runtime.cli.main import main

if __name__ == "__main__":
    main()
