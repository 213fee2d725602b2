"""How the runs of a sweep are carried out: on this machine side by side, or as one array job."""
