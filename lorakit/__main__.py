"""`python -m lorakit`: the command line, of the interpreter that is meant."""

from lorakit.cli import main

if __name__ == "__main__":
    main()
