"""The arithmetic of depth mixing: ``reference`` reads like the papers, ``eager`` is fast without a compiler."""
