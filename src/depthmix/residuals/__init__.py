def available_residuals():
    return ["prenorm", "mgr-independent", "mgr-competitive"]
