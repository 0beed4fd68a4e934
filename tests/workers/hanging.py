"""A job module whose import takes for ever."""

import time

time.sleep(600)
