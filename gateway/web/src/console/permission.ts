/** What the signed-in member may do in a workspace, by the permissions that `/api/v1/me` tells. */
import type { Workspace } from '../client';

/** To ask an agent takes the permissions to read what it reads. */
export const ASK_AGENTS = ['ai:use', 'metric:read', 'stream:read', 'portfolio:read', 'alert:read', 'query:run'];

/** Whether the permission is held in the whole workspace, or on this resource (`streams/market.trades`). */
export function may({ permissions = [] }: Workspace, permission: string, resource?: string): boolean {
  return (
    permissions.includes(permission) || (resource !== undefined && permissions.includes(`${permission}@${resource}`))
  );
}

/** The resources on which the permission is held one by one. */
export function grantedOn({ permissions = [] }: Workspace, permission: string): string[] {
  return permissions.flatMap((held) => (held.startsWith(`${permission}@`) ? [held.slice(permission.length + 1)] : []));
}

/** Whether the permission is held on some resource at least: lists are cut to those. */
export function maySomewhere(workspace: Workspace, permission: string): boolean {
  return may(workspace, permission) || grantedOn(workspace, permission).length > 0;
}

/** Why something is withheld. */
export function lack({ role }: Workspace, permission: string): string {
  return `Your role ${role} lacks the permission ${permission}.`;
}
