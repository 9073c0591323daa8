/* static.c - what the programs of the portable archive have in place of shared libraries.
 *
 * libmicrohttpd.a names GnuTLS, of which Debian has no complete static library. It calls GnuTLS for
 * TLS alone, which qemb-serve leaves to a proxy, and to start and end the library. So starting is
 * nothing here, and every other function ends the process. A name that a newer libmicrohttpd needs
 * fails the link.
 *
 * What glibc and libcrypto would load from the machine at run time was built for another glibc. So
 * the names of hosts come from /etc/hosts and DNS alone, and OpenSSL's configuration is not read.
 */
#include <nss.h>
#include <openssl/crypto.h>
#include <stdlib.h>

__attribute__((constructor)) static void load_nothing(void) {
    __nss_configure_lookup("hosts", "files dns");
    OPENSSL_init_crypto(OPENSSL_INIT_NO_LOAD_CONFIG, NULL);
}

int gnutls_global_init(void);
int gnutls_global_init(void) { return 0; }
void gnutls_global_deinit(void);
void gnutls_global_deinit(void) {}

_Noreturn void qemb_no_tls(void);
_Noreturn void qemb_no_tls(void) { abort(); }

#define NO_TLS(name) \
    void name(void); \
    void name(void) __attribute__((alias("qemb_no_tls")))

NO_TLS(gnutls_alpn_set_protocols);
NO_TLS(gnutls_bye);
NO_TLS(gnutls_certificate_allocate_credentials);
NO_TLS(gnutls_certificate_free_credentials);
NO_TLS(gnutls_certificate_server_set_request);
NO_TLS(gnutls_certificate_set_dh_params);
NO_TLS(gnutls_certificate_set_retrieve_function2);
NO_TLS(gnutls_certificate_set_retrieve_function3);
NO_TLS(gnutls_certificate_set_x509_key_mem);
NO_TLS(gnutls_certificate_set_x509_key_mem2);
NO_TLS(gnutls_certificate_set_x509_trust_mem);
NO_TLS(gnutls_cipher_get);
NO_TLS(gnutls_credentials_set);
NO_TLS(gnutls_deinit);
NO_TLS(gnutls_dh_params_deinit);
NO_TLS(gnutls_dh_params_import_pkcs3);
NO_TLS(gnutls_dh_params_init);
NO_TLS(gnutls_handshake);
NO_TLS(gnutls_init);
NO_TLS(gnutls_priority_deinit);
NO_TLS(gnutls_priority_init);
NO_TLS(gnutls_priority_set);
NO_TLS(gnutls_protocol_get_version);
NO_TLS(gnutls_psk_allocate_server_credentials);
NO_TLS(gnutls_psk_free_server_credentials);
NO_TLS(gnutls_psk_set_server_credentials_function);
NO_TLS(gnutls_record_check_pending);
NO_TLS(gnutls_record_get_direction);
NO_TLS(gnutls_record_recv);
NO_TLS(gnutls_record_send);
NO_TLS(gnutls_session_get_ptr);
NO_TLS(gnutls_session_set_ptr);
NO_TLS(gnutls_strerror);
NO_TLS(gnutls_transport_set_int2);
/* A variable of GnuTLS, the function with which it allocates. */
extern void *(*gnutls_malloc)(size_t);
void *(*gnutls_malloc)(size_t) = malloc;
