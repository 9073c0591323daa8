/* static.c - what the programs of the portable archive have in place of shared libraries.
 *
 * What glibc and libcrypto would load from the machine at run time was built for another glibc. So
 * the names of hosts come from /etc/hosts and DNS alone, and OpenSSL's configuration is not read.
 */
#include <nss.h>
#include <openssl/crypto.h>

__attribute__((constructor)) static void load_nothing(void) {
    __nss_configure_lookup("hosts", "files dns");
    OPENSSL_init_crypto(OPENSSL_INIT_NO_LOAD_CONFIG, NULL);
}
