"""``python -m flatq`` is ``flatq``."""

from flatq.cli import app

if __name__ == "__main__":
    app(prog_name="flatq")
