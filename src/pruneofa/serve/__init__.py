"""The server: TEI's routes and others over the engine, one queue of token sequences, a page. No torch."""
