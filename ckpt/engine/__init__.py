"""The two stories, a dump and a restore, told top to bottom over the layers below."""
