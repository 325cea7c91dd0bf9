"""Imported first in a program: Ctrl-C while the others are imported ends it without a traceback, as there is nothing to save.

A KeyboardInterrupt there would crash libraries that are just being loaded. `commandline.exit_on_user_error` lets a command catch it.
"""

import signal

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # a shell lets programs in the background ignore it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
