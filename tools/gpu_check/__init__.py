"""One command for a machine with a GPU: everything that only hardware can tell, within nine minutes, in one folder."""
