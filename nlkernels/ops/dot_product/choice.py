"""Which backend `auto` prefers: there is one."""

TABLE: dict = {}
