"""What processes and machines need for any computation: hosts, devices, files, flags."""
