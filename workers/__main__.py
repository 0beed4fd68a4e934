"""``python -m workers``: one worker process."""

from workers.app import main

main()
