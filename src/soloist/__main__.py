"""`python -m soloist`, which is also how torchrun starts ranks."""

from soloist.cli import main

if __name__ == "__main__":
    main()
