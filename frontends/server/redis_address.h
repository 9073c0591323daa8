/* redis_address.h - where a Redis is: the value of --redis. */
#ifndef QEMB_REDIS_ADDRESS_H
#define QEMB_REDIS_ADDRESS_H

typedef struct {
    char host[256];
    char user[128]; /* "": Redis' default user */
    int port, db;
    int tls; /* 1: rediss:// */
} redis_address;

/* Reads HOST:PORT or redis://[USER@]HOST[:PORT][/DB], with rediss: for TLS; an IPv6 address stands
 * in brackets. Returns NULL, or what is wrong with s. */
const char *redis_address_read(redis_address *a, const char *s);

#endif
