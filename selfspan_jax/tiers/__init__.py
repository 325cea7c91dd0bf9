"""Rows in host memory. To read in this order: `engine` has the idea, `cache` what lies where, `working_sets` what a step does about it.

`prefill` reads prompts layer by layer. The server's `host_pages` builds on `working_sets` too.
"""
