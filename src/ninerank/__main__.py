"""`python -m ninerank` is the command `ninerank`."""

from ninerank.cli.main import main

if __name__ == "__main__":
    main()
