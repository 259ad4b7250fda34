"""What nginx is told: two workers, in the foreground, and all that it writes in one directory."""

from pathlib import Path

_CONFIG = """\
daemon off;
user root;
worker_processes 2;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    keepalive_timeout 600s;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen {listen};
        root {directory}/root;
        {more}
    }}
}}
"""


def nginx_config(directory: Path, listen: str, *more: str) -> str:
    """Return a configuration that serves `directory`/root; `more` are lines of the server."""
    return _CONFIG.format(directory=directory, listen=listen, more="\n        ".join(more))
