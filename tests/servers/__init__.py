"""A local server that speaks OpenAI's protocol, misbehaves on request, and counts: `tests.servers.api`."""
