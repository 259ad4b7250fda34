"""Live migration: the channel between two hosts, and what is built upon it.

The channel, from the bytes up: `transport` (TLS, or the pipes of ssh), `frames` (how one message
lies on the wire), `message` and `messages` (what may be said, typed), `channel` (say and hear,
with time limits), `handshake` (who may speak at all). `dial` opens channels to a destination,
`listen` answers them, each session in a process of its own (`session`).
"""
