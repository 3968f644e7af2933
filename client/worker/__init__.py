"""The warm worker of a real site: one process that keeps the base model, between messages, rounds and runs.

The ClientApp passes each message on (``ask``) through a private Unix socket (``place``, ``wire``) to the process
that answers (``serve``).
"""
