/* probe.h - asks a server whether it is healthy, for a container's health check. */
#ifndef QEMB_PROBE_H
#define QEMB_PROBE_H

/* Sends GET /health to the server that listens on host and port. Returns STATUS_GOOD if the answer
 * is 200, else STATUS_USAGE after a message; Docker knows no other statuses. */
int probe(const char *host, int port);

#endif
